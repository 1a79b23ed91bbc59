"""The table of the how-to page says what the code can do. On failure it prints the one that should stand there."""

from pathlib import Path

import torch
from registry import FAMILIES, build
from torch.distributions import kl_divergence

from pyro_vje.distributions import HypersphericalUniform, PolarStudentT

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "distributions.md"
MARK = "<!-- families: checked by tests/distributions/test_integral_table.py -->\n"


def works(function):
    try:
        function()
    except (NotImplementedError, AttributeError):
        return False
    return True


def members(family):
    if family is not PolarStudentT:
        return {family.__name__: family.__name__}
    parts = [(d, r) for d in ("restricted", "projected") for r in ("student-t", "log-student-t")]
    return {f"PolarStudentT ({d}, {r})": f"PolarStudentT-{d}-{r}" for d, r in parts}


def row(label, name, family):
    make, arguments, _ = build(name)
    law = make(*arguments)
    samples = law.sample((20,))
    uniform = HypersphericalUniform(4, dtype=torch.float64)
    yes = {
        "draws": "rsample" if law.has_rsample else "sample",
        "mean, variance": works(lambda: (law.mean, law.variance)),
        "mode": works(lambda: law.mode),
        "entropy": works(law.entropy),
        "KL in the family": works(lambda: kl_divergence(law, law)),
        "KL to uniform": works(lambda: kl_divergence(law, uniform)),
        "fit": works(lambda: family.fit(samples, method="moments")),
        "vmap": works(lambda: torch.func.vmap(law.log_prob)(samples)),
        "latent of NUTS": "as it is"
        if works(lambda: torch.distributions.biject_to(law.support))
        else "by SphereReparam",
    }
    return {"family": label} | {key: {True: "yes", False: "—"}.get(value, value) for key, value in yes.items()}


def table():
    rows = [row(label, name, family) for family in FAMILIES for label, name in members(family).items()]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(each.values()) for each in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def test_table_of_families():
    found = PAGE.read_text().partition(MARK)[2].lstrip("\n").partition("\n\n")[0] + "\n"
    assert found == table(), table()
