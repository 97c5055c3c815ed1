"""Published figures of the zoo's models: parameter counts, and multiply-accumulates of one forward pass."""

TORCHVISION = "torchvision's table of classification weights"
HUB = "number of parameters of the published weights on the Hugging Face hub"

# name -> (parameters, source); every one is exact.
PARAMETERS: dict[str, tuple[int, str]] = {
    "lenet5": (61_706, "LeNet-5 with full connections in C3 and a linear output layer, as commonly rebuilt"),
    "alexnet": (61_100_840, TORCHVISION),
    "vgg11": (132_863_336, TORCHVISION),
    "vgg13": (133_047_848, TORCHVISION),
    "vgg16": (138_357_544, TORCHVISION),
    "vgg19": (143_667_240, TORCHVISION),
    "resnet50": (25_557_032, TORCHVISION),
    "resnet101": (44_549_160, TORCHVISION),
    "resnet152": (60_192_808, TORCHVISION),
    "googlenet": (6_624_904, TORCHVISION),
    "gpt2": (124_439_808, HUB),
    "gpt2-medium": (354_823_168, HUB),
    "gpt2-large": (774_030_080, HUB),
    "gpt2-xl": (1_557_611_200, HUB),
    "llama2-7b": (6_738_415_616, HUB),
    "llama2-13b": (13_015_864_320, HUB),
    "llama2-70b": (68_976_648_192, HUB),
    "llama3-1b": (1_235_814_400, HUB),
    "llama3-3b": (3_212_749_824, HUB),
    "llama3-8b": (8_030_261_248, HUB),
    "llama3-70b": (70_553_706_496, HUB),
    "llama3-405b": (405_853_388_800, HUB),
    "mixtral-8x7b": (46_702_792_704, HUB),
    "mixtral-8x22b": (140_620_634_112, HUB),
    "bert-base": (109_514_298, "BertForMaskedLM of bert-base-uncased, " + HUB),
    "bert-large": (335_174_458, "BertForMaskedLM of bert-large-uncased, " + HUB),
    "vit-b16": (86_567_656, TORCHVISION),
    "vit-l16": (304_326_632, TORCHVISION),
}

# name -> (millions of parameters as printed, source); printed figures are rounded.
ROUNDED_PARAMETERS: dict[str, tuple[float, str]] = {
    "lstm-medium": (20, "Zaremba et al. 2014's medium model, size as quoted by Gal and Ghahramani 2016, table 1"),
    "lstm-large": (66, "Zaremba et al. 2014's large model, size as quoted by Gal and Ghahramani 2016, table 1"),
    "gpt3-125m": (125, "Brown et al. 2020, table 2.1"),
    "gpt3-350m": (350, "Brown et al. 2020, table 2.1"),
    "gpt3-760m": (760, "Brown et al. 2020, table 2.1"),
    "gpt3-1.3b": (1_300, "Brown et al. 2020, table 2.1"),
    "gpt3-2.7b": (2_700, "Brown et al. 2020, table 2.1"),
    "gpt3-6.7b": (6_700, "Brown et al. 2020, table 2.1"),
    "gpt3-13b": (13_000, "Brown et al. 2020, table 2.1"),
    "gpt3-175b": (175_000, "Brown et al. 2020, table 2.1"),
}

# name -> (GMAC of one forward pass of one 224 x 224 image, decimals printed). torchvision prints these as GFLOPS,
# but counts a multiply-accumulate as one.
FORWARD_GMAC: dict[str, tuple[float, int]] = {
    "alexnet": (0.714, 3),
    "vgg11": (7.609, 3),
    "vgg13": (11.308, 3),
    "vgg16": (15.47, 2),
    "vgg19": (19.632, 3),
    "resnet50": (4.089, 3),
    "resnet101": (7.801, 3),
    "resnet152": (11.514, 3),
    "googlenet": (1.498, 3),
    "vit-b16": (17.564, 3),
    "vit-l16": (61.555, 3),
}
