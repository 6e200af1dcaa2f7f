"""sketch: a converter turns RGB into lines; the engine runs one over a picture of any size, tile by tile."""
