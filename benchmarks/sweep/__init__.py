"""Converts the models of torchvision, timm and transformers one by one, and checks what conversion promises."""
