"""Parameters and GMACs at 224 of every network that was published; BViT's also those with the tokens of its code.

GMACs as `helpers.published.gmacs` counts them: norms included, unlike ViTAE's published counts.
"""
BIFORMER = {
    "biformer_tiny": (13_142_760, 2.23),
    "biformer_small": (25_536_232, 4.49),
    "biformer_base": (56_804_968, 9.79),
    "biformer_stl": (28_372_552, 4.59),
}
BVIT = {
    "bvit_5m": (5_710_948, 1.28, 1.46),
    "bvit_22m": (22_037_284, 4.63, 4.99),
}
DEBIFORMER = {
    "debiformer_tiny": (21_495_598, 2.65),
    "debiformer_small": (44_008_028, 5.44),
    "debiformer_base": (95_501_926, 11.74),
}
VITAE = {
    "vitae_tiny": (4_882_792, 1.77),
    "vitae_6m": (6_610_024, 2.17),
    "vitae_13m": (10_830_632, 3.05),
    "vitae_s": (24_009_096, 6.21),
    "vitae_b": (89_341_672, 18.12),
    "vitae_l": (311_724_008, 63.03),
    "vitae_h": (644_528_360, 129.77),
}
VITAEV2 = {
    "vitaev2_s": (19_355_688, 5.78),
    "vitaev2_48m": (48_674_632, 13.39),
    "vitaev2_b": (89_693_352, 24.44),
}
FAMILIES = (BIFORMER, BVIT, DEBIFORMER, VITAE, VITAEV2)
ALL = {name: (costs[0], costs[1]) for family in FAMILIES for name, costs in family.items()}
