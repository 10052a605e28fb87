"""What surrounds the product: the demo, the model and the data it uses, llama.cpp's installation. Nothing here is imported by it."""
