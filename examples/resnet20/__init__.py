"""The parts of the CIFAR ResNet-20 example, one idea a file."""
