"""The stand-in's student: small enough to train in a test."""

from torch import nn


def get_model(name: str, **kwargs: object) -> nn.Module:
    """A convolution, a batch norm and a linear layer; called as ``get_model(name, dropout=, fp16=, num_features=)``."""
    if name != "tiny":
        raise ValueError(f"network is {name!r}; the stand-in has 'tiny' only")
    if set(kwargs) != {"dropout", "fp16", "num_features"}:
        raise TypeError(f"get_model was called with {sorted(kwargs)}")
    num_features = kwargs["num_features"]
    assert isinstance(num_features, int)
    return nn.Sequential(
        nn.AvgPool2d(4),
        nn.Conv2d(3, 16, kernel_size=4, stride=4, bias=False),
        nn.BatchNorm2d(16),
        nn.PReLU(16),
        nn.Flatten(),
        nn.Linear(16 * 7 * 7, num_features),
        nn.BatchNorm1d(num_features),
    )
