"""`ops`, from the package or the checkout: the only file of `models` that imports it."""
if "." in __package__:  # installed, as routedvit.models
    from ..ops import (
        BiLevelRoutingAttention,
        DepthwiseConv,
        RegionGrid,
        Routing,
        add_layer_norm,
        check_layer_impl,
        conv_channels_last,
        is_plain,
        is_traced_or_transformed,
        layer_norm,
        linear_gelu,
        reuses_memory,
        route_regions,
        routed_attention,
    )
else:  # from the checkout
    from ops import (
        BiLevelRoutingAttention,
        DepthwiseConv,
        RegionGrid,
        Routing,
        add_layer_norm,
        check_layer_impl,
        conv_channels_last,
        is_plain,
        is_traced_or_transformed,
        layer_norm,
        linear_gelu,
        reuses_memory,
        route_regions,
        routed_attention,
    )

__all__ = [
    "BiLevelRoutingAttention",
    "DepthwiseConv",
    "RegionGrid",
    "Routing",
    "add_layer_norm",
    "check_layer_impl",
    "conv_channels_last",
    "is_plain",
    "is_traced_or_transformed",
    "layer_norm",
    "linear_gelu",
    "reuses_memory",
    "route_regions",
    "routed_attention",
]
