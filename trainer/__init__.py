"""trainer: a light image-prompt adapter on a frozen Stable Diffusion, from the Lance dataset."""
