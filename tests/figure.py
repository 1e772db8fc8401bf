"""Draw README's figure: where two models find the descriptions of a scene. Run by hand.

    python tests/figure.py L_CLIP_RUN BETA_CLIP_RUN .github/figure.png

Of each scene of the split val, the contrast of a query is the mean similarity of the patches in the
quarter that it describes, less that of all others. The scene that is drawn is the one in which the
two models' mean contrasts differ by the median: half of the scenes show the difference more clearly
and half less. Maps show similarity less its mean; a query's two maps share one colour scale.
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import data  # noqa: E402
from eval import compute_heatmaps  # noqa: E402
from model import load  # noqa: E402

SIDE = 192  # of a map, in pixels
GAP = 12
NAMES = ("L_clip only", "beta-CLIP")  # the default font has no β


def similarity_maps(run: str, indices: range) -> list[Tensor]:
    """Similarity of patches with the four descriptions of each scene, [4, side, side] each."""
    model, tokenizer = load(run)
    maps = []
    for index in indices:
        scene = data.make_scene("val", index)
        queries = [data.describe_object(obj) for obj in scene]
        heatmaps = compute_heatmaps(model, tokenizer, data.draw_scene(scene), queries)
        maps.append(heatmaps["similarity"])
    return maps


def contrast(maps: Tensor) -> float:
    """The mean over four queries of the similarity in their own quarter, less that elsewhere."""
    half = maps.shape[1] // 2
    quarters = maps.unflatten(2, (2, half)).unflatten(1, (2, half)).mean(dim=(2, 4)).flatten(1)
    own = quarters.diagonal()                                                       # [4]
    others = (quarters.sum(dim=1) - own) / 3                                        # [4]
    return (own - others).mean().item()


def draw_map(heat: Tensor, limit: float) -> Image.Image:
    """A map in colour, from -limit, dark blue, to limit, yellow."""
    grey = (127.5 + 127.5 * heat / limit).byte().numpy()
    coloured = ImageOps.colorize(Image.fromarray(grey), "#08164c", "#ffe55c", mid="#2a9d8f")
    return coloured.resize((SIDE, SIDE), Image.Resampling.NEAREST)


def draw_figure(picture: Image.Image, queries: list[str], maps: list[Tensor]) -> Image.Image:
    """The picture at the left, and beside it a row of maps for each model."""
    font = ImageFont.load_default(15)
    header = 48
    left = SIDE + 2 * GAP
    size = (left + len(queries) * (SIDE + GAP), header + len(NAMES) * (SIDE + 24 + GAP))
    figure = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(figure)
    figure.paste(picture.resize((SIDE, SIDE), Image.Resampling.NEAREST), (GAP, header + 24))
    for column, query in enumerate(queries):
        x = left + column * (SIDE + GAP)
        draw.text((x, 6), query.replace(" on ", "\non "), "black", font)
        both = [of_model[column] - of_model[column].mean() for of_model in maps]
        limit = max(heat.abs().max().item() for heat in both)
        for row, heat in enumerate(both):
            y = header + row * (SIDE + 24 + GAP)
            draw.text((x, y + 2), NAMES[row], "dimgray", font)
            figure.paste(draw_map(heat, limit), (x, y + 24))
    return figure


def main(l_clip_run: str, beta_clip_run: str, out: str) -> None:
    indices = range(0, data.NUM_SCENES["val"], data.GROUP_SIZE)
    maps = [similarity_maps(run, indices) for run in (l_clip_run, beta_clip_run)]
    gains = [contrast(ours) - contrast(theirs) for theirs, ours in zip(*maps, strict=True)]
    median = sorted(range(len(gains)), key=gains.__getitem__)[len(gains) // 2]
    scene = data.make_scene("val", indices[median])
    queries = [data.describe_object(obj) for obj in scene]
    draw_figure(data.draw_scene(scene), queries, [of_run[median] for of_run in maps]).save(out)
    print(f"{out}: scene {indices[median]} of val, difference {gains[median]:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
