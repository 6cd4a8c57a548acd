"""`ops`, from the package or the checkout: the only file of `models` that imports it."""
if "." in __package__:  # installed, as routedvit.models
    from ..ops import (
        BiLevelRoutingAttention,
        RegionGrid,
        Routing,
        conv_channels_last,
        route_regions,
        routed_attention,
    )
else:  # from the checkout
    from ops import (
        BiLevelRoutingAttention,
        RegionGrid,
        Routing,
        conv_channels_last,
        route_regions,
        routed_attention,
    )

__all__ = [
    "BiLevelRoutingAttention",
    "RegionGrid",
    "Routing",
    "conv_channels_last",
    "route_regions",
    "routed_attention",
]
