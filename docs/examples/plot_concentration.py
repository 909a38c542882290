r"""
What the concentration prior does, and why it seems to do nothing
=================================================================

``weight_concentration_prior`` (a0) is often turned over many powers of ten without any effect on
the number of components. The picture shows why. Under a Dirichlet process the labels of N rows
that use k components with N_1, ..., N_k rows have the prior probability

.. math::
    \log p(z) = k \log a_0 + \sum_j \log \Gamma(N_j)
        + \log\Gamma(a_0) - \log\Gamma(a_0 + N),

(Antoniak 1974), in which a0 multiplies k by ``log a0`` once, whatever the number of rows: a tenth
of a0 makes each further component 2.3 nats dearer. What the rows say grows with their number.

Run it; it prints a table and saves the picture beside this file.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from skvi import VariationalGMM

HERE = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
IMAGES = HERE / "images"
IMAGES.mkdir(exist_ok=True)

# Four round clusters that touch: neighbours are four standard deviations apart.
CENTRES = 4.0 * np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
SIZES = [20, 60, 200, 2000]
CONCENTRATIONS = np.logspace(-12, 4, 17)


def draw(n_rows: int) -> np.ndarray:
    """Rows of the four clusters, the same number of each."""
    rng = np.random.default_rng(0)
    return CENTRES[np.arange(n_rows) % 4] + rng.normal(size=(n_rows, 2))


# %%
# How many components are used, for how many rows and which a0
# -------------------------------------------------------------

active = np.array(
    [
        [
            VariationalGMM(
                10, weight_concentration_prior=a0, covariance_type="spherical", random_state=0
            )
            .fit(draw(n_rows))
            .n_active_components_
            for a0 in CONCENTRATIONS
        ]
        for n_rows in SIZES
    ]
)
print("components used (of 10; 4 planted)")
print("a0      ", "".join(f"{a0:>7.0e}" for a0 in CONCENTRATIONS[::2]))
for n_rows, numbers in zip(SIZES, active, strict=True):
    print(f"N = {n_rows:5d}", "".join(f"{number:7d}" for number in numbers[::2]))

# %%
# What one more component costs, and what it earns
# ------------------------------------------------
# The bound of fits with at most k components, relative to one component, for two very different
# concentrations.

TRUNCATIONS = np.arange(1, 9)
EXTREMES = {1e-6: "o-", 1.0: "s--"}
X = draw(2000)
bounds = {
    a0: np.array(
        [
            VariationalGMM(
                k, weight_concentration_prior=a0, covariance_type="spherical", random_state=0
            )
            .fit(X)
            .elbo_
            for k in TRUNCATIONS
        ]
    )
    for a0 in EXTREMES
}
for a0, values in bounds.items():
    print(f"a0 = {a0:g}: bound above that of one component", np.round(values - values[0], 1))

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
for n_rows, numbers, marker in zip(SIZES, active, "osD^", strict=True):
    left.plot(CONCENTRATIONS, numbers, marker + "-", label=f"{n_rows} rows")
left.axhline(4, color="0.6", linewidth=0.8, zorder=0)
left.set(
    xscale="log",
    xlabel="weight_concentration_prior",
    ylabel="n_active_components_",
    title="Few rows listen to the prior, many do not",
    ylim=(0.5, 10.5),
)
left.legend()
for a0, marker in EXTREMES.items():
    values = bounds[a0]
    right.plot(TRUNCATIONS, values - values[0], marker, label=f"a0 = {a0:g}")
right.set(
    xlabel="n_components",
    ylabel="elbo_ above that of one component, nats",
    title="2000 rows: what one more component earns",
)
right.legend()
figure.savefig(IMAGES / "concentration.png", dpi=110)
plt.close(figure)
print(f"\nPicture: {IMAGES.name}/concentration.png")
