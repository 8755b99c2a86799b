"""The alert rules: Prometheus' own checker reads them, and each fires when it should and only then."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus import program

RULES = Path(__file__).parents[2] / "k8s" / "overlays" / "monitoring" / "lserve-alerts.yaml"
CASES = Path(__file__).with_name("alerts.test.yaml")


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    """What the PrometheusRule holds, as a file that Prometheus reads."""
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(RULES.read_text())["spec"]))
    return path


def test_rules_have_no_errors(rules: Path) -> None:
    checked = subprocess.run([program("promtool"), "check", "rules", rules], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    names = {rule["alert"] for rule in yaml.safe_load(rules.read_text())["groups"][0]["rules"]}
    assert f"{len(names)} rules found" in checked.stdout


def test_every_alert_fires_when_it_should(rules: Path) -> None:
    cases = rules.with_name(CASES.name)
    shutil.copy(CASES, cases)
    tested = subprocess.run([program("promtool"), "test", "rules", cases], capture_output=True, text=True)
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_every_alert_has_a_case_and_a_runbook(rules: Path) -> None:
    groups = yaml.safe_load(rules.read_text())["groups"]
    cases = CASES.read_text()
    for rule in (rule for group in groups for rule in group["rules"]):
        assert f'alertname="{rule["alert"]}",alertstate="firing"' in cases
        assert len(rule["annotations"]["runbook"]) > 40
