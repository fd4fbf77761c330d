"""The kinds of findings of `fsr-fast data check`; nothing is imported here, so that the command line needs no torch."""

KINDS = {
    "outside": "names and links that lead out of the data set, and invalid file names",
    "listed-twice": "duplicate names in a list",
    "missing-image": "listed pictures without a file",
    "damaged-image": "pictures that cannot be decoded, or are too large",
    "channels": "pictures whose number of channels keeps them from being read like most others",
    "bad-label": "pictures without a row of labels, or with one that cannot be read",
    "no-label": "training pictures whose label is empty, where that may be forgotten",
    "two-files": "names without an extension that fit several pictures",
    "unlisted": "pictures of an own data set that no table names",
    "missing-mask": "validation pictures without a mask",
    "damaged-mask": "masks that cannot be decoded, are of another kind, or hold an unknown value",
    "mask-size": "masks of another size than their picture",
    "label-not-in-mask": "labels whose class the mask lacks",
    "mask-not-in-label": "classes of the mask that the labels lack",
    "duplicate": "pictures with the pixels of another one of their list",
    "leak": "training pictures with the pixels of a validation picture",
}
