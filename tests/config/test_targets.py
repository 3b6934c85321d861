"""Targets: bound to their signatures without an import, and refused where they could run any code."""

import sys

import pytest
from support.configs import assert_error, assert_refused

from aem_exp import config
from aem_exp.config import ConfigError, targets

pytestmark = pytest.mark.usefixtures("clean")


@pytest.mark.parametrize(
    ("target", "keywords", "field"),
    [
        ("mine.Renamed", {"size": 1, "kind": "b", "items": [1]}, None),
        ("mine.things.Child", {}, "x.size"),
        ("mine.things.Child", {"size": "big"}, "x.size"),
        ("mine.things.Child", {"size": 1, "kind": "c"}, "x.kind"),
        ("mine.things.Child", {"size": 1, "hidden": 1}, "x.hidden"),
        ("mine.things.Child", {"size": 1, "shared": 1}, "x.shared"),
        ("mine.things.Init", {"width": 1, "deep": True}, None),
        ("mine.things.Init", {"width": 1, "deep": "very"}, "x.deep"),
        ("mine.things.Plain", {"whatever": 1}, None),
        ("mine.things.anything", {"whatever": 1}, None),
        ("mine.things.alias", {"whatever": 1}, None),
        ("mine.things.Chld", {}, "x._target_"),
        ("mine.thing.Child", {}, "x._target_"),
        ("yours.things.Child", {}, "x._target_"),
        ("mine.things.Child", {"size": 1, "items": {"_target_": "mine.things.Child", "sise": 1}}, "x.items.sise"),
    ],
)
def test_targets_are_bound_without_importing(user_package, target, keywords, field):
    block = {"_target_": target, **keywords}
    if field is None:
        assert targets.bind_target("x", block) == block
    else:
        with pytest.raises(ConfigError) as caught:
            targets.bind_target("x", block)
        assert caught.value.field == field
    assert "mine.things" not in sys.modules


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "fact"),
    [
        ("builtins.eval", "standard library"),
        ("os.system", "standard library"),
        ("posix.system", "standard library"),
        ("importlib.import_module", "standard library"),
        ("shutil.rmtree", "standard library"),
        ("msvcrt.getch", "standard library"),
        ("torch.hub.load", "torch"),
        ("yaml.unsafe_load", "pyyaml"),
        ("joblib.load", "joblib"),  # a dependency of a dependency
        ("pip.main", "pip"),
        ("numpy.os.system", "numpy"),
        ("aem_exp.config.launch_rules.find_spec", "importlib"),  # imported there for internal use
        ("aem_exp.config.rules.os.system", "aem_exp.config.rules.os"),
    ],
)
def test_targets_that_could_run_any_code_are_refused_by_name(user_package, target, fact):
    nested = {"_target_": "mine.things.Plain", "whatever": {"_target_": target}}
    for block, field in (({"_target_": target}, "x._target_"), (nested, "x.whatever._target_")):
        with pytest.raises(ConfigError) as caught:
            targets.bind_target("x", block)
        assert_error(caught.value, field, fact)
    if not target.startswith("aem_exp."):
        with pytest.raises(ConfigError) as caught:
            targets.instantiate({"_target_": target})
        assert_error(caught.value, "_target_", fact)
    assert "mine.things" not in sys.modules


@pytest.mark.slow
def test_an_installed_package_of_the_user_may_be_named(tmp_path, monkeypatch):
    """The user installed it with pip, next to the libraries of this package."""
    site = tmp_path / "site-packages"
    (site / "installed_plugin").mkdir(parents=True)
    (site / "installed_plugin/__init__.py").write_text("def estimate(played):\n    return played\n")
    record = site / "installed_plugin-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: installed-plugin\nVersion: 1.0\nRequires-Dist: torch\n"
    )
    (record / "RECORD").write_text("installed_plugin/__init__.py,,\n")
    monkeypatch.syspath_prepend(str(site))
    block = {"_target_": "installed_plugin.estimate"}
    assert targets.bind_target("x", block, positional=1) == block
    assert targets.instantiate(block, partial=True)(5) == 5


def test_instantiate():
    block = {"_target_": "aem_exp.schedules.Linear", "start": 1.0}
    assert config.instantiate(block | {"end": 0.0})(0.5) == 0.5
    assert config.instantiate(block, partial=True)(end=0.0)(0.5) == 0.5


REFUSED = [  # overrides, the field of the error, and a fact that the error must state
    ("env.make.receptcles=3", "env.make.receptcles", "did you mean receptacles?"),
    ("env.make.receptacles=few", "env.make.receptacles", "a whole number"),
    ("env.make.kinds=[1]", "env.make.kinds[0]", "text"),
    ("env.make.kinds=look", "env.make.kinds", "a list, each item text"),
    ("env.make.sizes={dev:many}", "env.make.sizes.dev", "a whole number"),
    ("env.make.sizes=5", "env.make.sizes", "a mapping"),
    ("env.make._target_=aem_exp.envs.houshold.Household", "env.make._target_", "aem_exp.envs.household?"),
    ("env.make._target_=aem_exp.envs.household.Houshold", "env.make._target_", "did you mean Household"),
    ("env.make._target_=Household", "env.make._target_", "package.module.name"),
    ("env.make._target_=null", "env.make._target_", "package.module.name"),
    ("modulation.lam._target_=aem_exp.schedules.Linear", "modulation.lam.value", "end, start"),
    ("modulation.lam.valu=1", "modulation.lam.valu", "did you mean value?"),
    ("modulation.lam={_target_:aem_exp.schedules.Linear,end:0}", "modulation.lam.start", "aem_exp.schedules.Linear"),
    ("baseline.advantage.played=1", "baseline.advantage.played", "eps, over"),
    ("baseline.advantage._target_=aem_exp.core.disk.cache_dir", "baseline.advantage._target_", "1 argument"),
    ("baseline.advantage.over=turn", "baseline.advantage.over", "did you mean turns? choose from trajectories, turns"),
    ("model.make.folder=x", "model.make.folder", "hidden_size"),
    ("model.lora={rr:4}", "model.lora.rr", "did you mean r?"),
]


@pytest.mark.parametrize(("overrides", "field", "fact"), REFUSED, ids=[case[0] for case in REFUSED])
def test_keywords_are_checked_against_the_signature_of_their_target(composed, overrides, field, fact):
    assert_refused(composed, overrides, field, fact)
