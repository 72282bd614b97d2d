"""Linear algebra, hyperspherical energy and the SPHERE projection. Tensors in, tensors out; knows no models."""
