"""micro: a small Stable Diffusion family, trained from nothing on drawn footage, with the models that judge it."""
