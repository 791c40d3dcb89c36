"""Contrast of colours, and how they look to those who lack a kind of cone."""


def rgb(text):
    return tuple(int(text[i : i + 2], 16) / 255 for i in (1, 3, 5))


def linear(colour):
    return [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in colour]


def contrast(one, two):
    """WCAG 2.2, contrast ratio."""
    luminance = [sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear(rgb(x)), strict=True)) for x in (one, two)]
    return (max(luminance) + 0.05) / (min(luminance) + 0.05)


# Machado, Oliveira, Fernandes (2009), severity 1: how linear colours look to those who lack a kind of cone.
BLIND = {
    "protan": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deutan": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
}


def seen_by(kind, colour):
    return [sum(m * c for m, c in zip(row, linear(rgb(colour)), strict=True)) for row in BLIND[kind]]
