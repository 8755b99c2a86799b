"""Every metric is in the operator's guide."""

from pathlib import Path

from lserve.deployments.metrics import InMemoryInstrument, Metrics

GUIDE = Path(__file__).parents[2] / "docs" / "operations.md"


def test_every_metric_is_in_the_guide_with_its_labels() -> None:
    guide = GUIDE.read_text()
    instruments = [x for x in vars(Metrics()).values() if isinstance(x, InMemoryInstrument)]
    assert len(instruments) > 15
    for spec in (instrument.spec for instrument in instruments):
        labels = f"{{{','.join(spec.tags)}}}" if spec.tags else ""
        assert f"`{spec.name}{labels}`" in guide
