"""Channels after pruning of timm's two pruned networks, ecaresnet50d_pruned and ecaresnet101d_pruned.

Source: knapsack pruning with inner distillation (Aflalo et al. 2020, arXiv:2002.08258). The numbers are those of the
published weights in timm 1.0.31 (``timm/models/_pruned``), in the form of :attr:`ResNetConfig.pruned`.
"""

Pruned = tuple[tuple[int, tuple[tuple[int, int], ...]], ...]

PRUNED_50D: Pruned = (
    (19, ((47, 18), (52, 22), (64, 35))),
    (171, ((85, 37), (107, 80), (120, 85), (125, 87))),
    (818, ((198, 126), (255, 232), (256, 233), (253, 235), (256, 225), (256, 239))),
    (2022, ((492, 237), (512, 500), (512, 490))),
)  # fmt: skip

PRUNED_101D: Pruned = (
    (26, ((45, 25), (53, 20), (60, 27))),
    (142, ((81, 24), (93, 49), (102, 54), (122, 78))),
    (278, (
        (101, 25), (239, 160), (234, 156), (250, 176), (253, 191), (251, 175), (230, 128), (244, 154),
        (244, 159), (238, 97), (244, 149), (253, 181), (245, 119), (255, 216), (256, 201), (253, 149),
        (254, 141), (256, 190), (256, 217), (255, 156), (256, 155), (256, 232), (256, 214),
    )),
    (2042, ((499, 289), (512, 512), (512, 502))),
)  # fmt: skip
