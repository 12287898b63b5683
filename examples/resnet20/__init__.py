"""Networks, data, optimizers and the training loop of cifar_resnet20.py."""
