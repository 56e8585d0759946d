"""A folder of one's own: a pipeline, a network and data beside it, and no clone."""

from __future__ import annotations

from dataclasses import dataclass

from tests.acceptance.shell import Shell
from tests.acceptance.walk import expect

_MODELS = """
from torch import nn


def build(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, num_classes),
    )
"""
_DATA = """
import torch
from stages.data.dataset import DataSet, Split


def load(root, *, download=False):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (120, 3, 8, 8), dtype=torch.uint8, generator=generator)
    everything = Split(inputs=images, labels=torch.arange(120) % 2)
    parts = [everything.take(torch.arange(40) + start) for start in (0, 40, 80)]
    return DataSet(
        train=parts[0], validation=parts[1], test=parts[2],
        num_classes=2, mean=(0.5,), std=(0.5,),
    )
"""
_IMAGES = """
from pathlib import Path
from PIL import Image

for split in ("train", "val", "test"):
    for number, name in enumerate(("dark", "light")):
        folder = Path("data", "images", split, name)
        folder.mkdir(parents=True)
        for shade in range(8):
            Image.new("RGB", (8, 8), (128 * number + 8 * shade,) * 3).save(folder / f"{shade}.png")
"""
_PIPELINE = """
name: own
{plugins}
stages:
  own_data:
    uses: pretrain
    params: {{{model}, {data}, epochs: 1, batch_size: 8}}
"""
_MORE = """
  own_images:
    uses: pretrain
    params: {{{model}, {images}, dataset_args: {{image_size: 8}}, epochs: 1, batch_size: 8}}
  trained:
    {import_}
    params: {{{model}, {data}, path: out/model.safetensors}}
  evaluate:
    uses: evaluate
    inputs: {{models: [own_data, own_images, trained]}}
"""


@dataclass
class OwnFolder:
    """A folder made by the README's section on one's own model and data.

    Attributes:
        shell: of a folder that may be written into, in an environment with the extra `pipeline`.
        keys: what the README has a reader write into a pipeline file, each as in YAML.
    """

    shell: Shell
    keys: list[str]

    def use(self) -> None:
        """Write the files, run the pipeline, and check that all three models are evaluated."""
        folder = self.shell.folder / "own"
        (folder / "mypackage").mkdir(parents=True)
        (folder / "mypackage" / "models.py").write_text(_MODELS, encoding="utf-8")
        (folder / "mypackage" / "data.py").write_text(_DATA, encoding="utf-8")
        pipeline = folder / "pipeline.yaml"
        pipeline.write_text(self._filled(_PIPELINE), encoding="utf-8")
        own = Shell(folder, activation=self.shell.activation)
        own.run(f'python -c "{_IMAGES.replace(chr(34), chr(39))}"', shown="make data/images")
        own.run("fls run", shown="fls run, own data")
        own.run("fls export pipeline.yaml own_data out")
        pipeline.write_text(self._filled(_PIPELINE + _MORE), encoding="utf-8")
        own.run("fls run", shown="fls run, own images and a trained network")
        rows = own.run("fls results --csv").splitlines()[1:]
        expect(len(rows) == 3, f"own folder: {len(rows)} models are evaluated, not 3")

    def _filled(self, template: str) -> str:
        def key(beginning: str) -> str:
            found = [one for one in self.keys if one.startswith(beginning)]
            expect(bool(found), f"the README has no key `{beginning}...`")
            return found[0]

        return template.format(
            plugins=key("plugins:"),
            model=key("model: mypackage"),
            data=key("dataset: mypackage"),
            images=key("dataset: folder:").replace("PATH", "images"),
            import_=key("uses: import_checkpoint"),
        )
