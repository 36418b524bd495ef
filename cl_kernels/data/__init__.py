"""Real images for continual runs, and the backbone that looks at them.

`load` reads the embedded digits, a folder of class folders, an ``.npz`` shard, or a local torchvision or Hugging Face
data set; everything comes back as uint8 images [C, H, W]. `load_backbone` gives a timm vision transformer with weights
from a file. Nothing here opens a network connection.
"""

from cl_kernels.data.backbones import Backbone, load_backbone
from cl_kernels.data.catalog import check, load, names
from cl_kernels.data.joined import joined, part_of
from cl_kernels.data.preprocess import Preprocessing
from cl_kernels.data.sets import ImageData, ImageSet

__all__ = [
    "Backbone",
    "ImageData",
    "ImageSet",
    "Preprocessing",
    "check",
    "joined",
    "load",
    "load_backbone",
    "names",
    "part_of",
]
