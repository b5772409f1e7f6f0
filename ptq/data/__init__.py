"""Images and labels: folders, ``.npz`` files, Python callables, and any iterable of tensors."""

from ptq.data.image_data import ImageBatches as ImageBatches
from ptq.data.image_data import ImageData as ImageData
from ptq.data.open import open_data as open_data
from ptq.data.stream import iterate_images as iterate_images
