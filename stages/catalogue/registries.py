"""Names that parameters may take: networks, data sets and curvature methods."""

from __future__ import annotations

from pipeline.stage import Entry, Registry
from stages.data.place import (
    CIFAR100,
    FASHION_MNIST,
    TINY_IMAGENET,
    complete_folder,
    data_folder,
    tree_folder,
)
from stages.reference import RENAMED

MODELS = Registry(
    kind="model",
    options="model_args",
    entries={
        "digits_resnet": Entry(
            target="stages.models.digits_resnet:digits_resnet",
            sizes={"parameters": 15_774, "width": 12},
            summary="small residual network for 8x8 images (width, hidden)",
        ),
        "mlpnet": Entry(
            target="stages.models.mlpnet:mlpnet",
            sizes={"parameters": 32_360},
            summary="784-40-20-10 without biases",
        ),
        "resnet20": Entry(
            target="stages.models.resnet_cifar:resnet20",
            sizes={"parameters": 272_474, "width": 16},
            summary="ResNet20 in its CIFAR form (width)",
        ),
        "resnet18": Entry(
            target="stages.models.resnet_cifar:resnet18",
            sizes={"parameters": 11_173_962, "width": 64},
            summary="ResNet18 in its CIFAR form (width)",
        ),
    },
    open=True,
    prefixes={
        "torchvision/": Entry(
            target="stages.models.torchvision_models:build",
            summary="any classification network of torchvision.models, untrained",
        )
    },
)

DATASETS = Registry(
    kind="data set",
    options="dataset_args",
    entries={
        "digits": Entry(
            target="stages.data.digits:load",
            digest="f5435893a45e623f98701bc29e4e265a4b719b60dff40da8bd69186b20b8c3af",
            sizes={"bytes": 129_384, "classes": 10, "channels": 1},
            summary="1,797 handwritten digits, 8x8, shipped with scikit-learn",
        ),
        "mnist": Entry(
            target="stages.data.mnist:load_mnist",
            digest="c0beabf8ccf1f8fd41dc89d2096bf47b5d00f0755a62da5479bb5671e99d5235",
            sizes={"bytes": 55_440_000, "classes": 10, "channels": 1},
            summary="70,000 handwritten digits, 28x28",
        ),
        "fashion_mnist": Entry(
            target="stages.data.mnist:load_fashion_mnist",
            folder=lambda name: data_folder() / FASHION_MNIST,
            sizes={"bytes": 55_440_000, "classes": 10, "channels": 1},
            summary="70,000 pieces of clothing, 28x28",
        ),
        "cifar10": Entry(
            target="stages.data.cifar:load_cifar10",
            digest="f7b9ea97c677c098573e0042390d4c0fe9326cdea8950afe890e9182e1ed1f15",
            sizes={"bytes": 184_800_000, "classes": 10, "channels": 3},
            summary="60,000 images of 10 classes, 32x32",
        ),
        "cifar100": Entry(
            target="stages.data.cifar:load_cifar100",
            folder=lambda name: complete_folder(data_folder(), CIFAR100),
            sizes={"bytes": 184_800_000, "classes": 100, "channels": 3},
            summary="60,000 images of 100 classes, 32x32",
        ),
        "tiny_imagenet": Entry(
            target="stages.data.image_folder:load_tiny_imagenet",
            folder=lambda name: data_folder() / TINY_IMAGENET,
            sizes={"bytes": 1_352_560_000, "classes": 200, "channels": 3},
            summary="110,000 images of 200 classes, 64x64",
        ),
    },
    open=True,
    prefixes={
        "folder:": Entry(
            target="stages.data.image_folder:load",
            sizes={"channels": 3},
            folder=lambda name: tree_folder(data_folder(), name.removeprefix("folder:")),
            summary="a tree of images, PATH/{train,val,test}/CLASS/*; options image_size (pixels), "
            "background (grey level behind transparent pixels), upright (turned by EXIF)",
        )
    },
    data=True,
    verified_by="verify",
)

METHODS = Registry(
    kind="curvature method",
    entries={
        "fls": Entry(
            target="fishleg.estimators:FLS",
            summary="the FishLeg surgeon as published: inverse Fisher learned by Adam on fresh "
            "batches, carried through pruning",
        ),
        "eigen": Entry(
            target="fishleg.estimators:Eigen",
            summary="EK-FAC whose eigenvalues are shrunk towards K-FAC's; nothing is learned by a "
            "descent",
        ),
        "fishleg": Entry(
            target="fishleg.estimators:FishLeg",
            summary="inverse Fisher fitted to a fixed sample, by half-steps, Adam or in closed "
            "form",
        ),
        "obs": Entry(
            target="fishleg.estimators:OBS",
            summary="inverse of dense diagonal blocks of the Fisher (WoodFisher, oBERT)",
        ),
        "mfac": Entry(
            target="fishleg.estimators:MFAC",
            summary="low-rank inverse of a few gradients, layer by layer (M-FAC)",
        ),
        "kfac": Entry(
            target="fishleg.estimators:KFAC",
            summary="Kronecker factors, damped exactly in their eigenbasis",
        ),
        "ekfac": Entry(
            target="fishleg.estimators:EKFAC",
            summary="curvature measured in the eigenbasis of K-FAC (EK-FAC)",
        ),
        "layer": Entry(
            target="fishleg.estimators:LayerHessian",
            summary="Hessian of each layer's output error (of OBC, SparseGPT), of its inputs alone",
        ),
        "diagonal": Entry(
            target="fishleg.estimators:DiagonalFisher",
            summary="the Fisher's diagonal",
        ),
        "magnitude": Entry(
            target="fishleg.estimators:Magnitude",
            summary="the identity: saliency is the weight's square",
        ),
    },
    open=True,
    renamed=RENAMED,
)
