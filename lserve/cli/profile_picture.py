"""A picture of a head profile: layers by KV heads. matplotlib is imported when one is drawn."""

from pathlib import Path

from lserve.engine.head_profile import HeadProfile


def draw(path: Path, profile: HeadProfile, title: str) -> None:
    """Writes the picture as PNG: what each head's history is worth, and which heads stream."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    assert profile.scores is not None
    floor = 1e-4
    values = [[max(row[head], floor) for row in profile.scores] for head in range(profile.num_kv_heads)]
    size = (2.5 + 0.32 * profile.num_layers, 2.0 + 0.32 * profile.num_kv_heads)
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    image = axes.imshow(values, norm=LogNorm(floor, max(map(max, values))), cmap="viridis", aspect="equal")
    for layer, row in enumerate(profile.streaming):
        for head, streams in enumerate(row):
            if streams:
                place = (layer - 0.42, head - 0.42)
                axes.add_patch(Rectangle(place, 0.84, 0.84, fill=False, edgecolor="white", linewidth=1.6))
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("layer (white frame: streaming head)")
    axes.set_ylabel("KV head")
    axes.set_xticks(range(0, profile.num_layers, 1 if profile.num_layers <= 40 else 4))
    axes.set_yticks(range(profile.num_kv_heads))
    axes.tick_params(labelsize=7)
    figure.colorbar(
        image, ax=axes, label="share of the allowed loss that it uses up alone", location="bottom", aspect=50
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
