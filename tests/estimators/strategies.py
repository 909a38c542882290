"""Data that go wrong: hypothesis strategies that the estimators' suites share."""

import numpy as np
from hypothesis import strategies as st

SCALES = [1e-150, 1e-30, 1e-8, 1.0, 1e8, 1e30, 1e150]


@st.composite
def awkward_data(draw, *, max_features=4):
    """Return (X, description): rows with planted defects, in float64 or float32."""
    n = draw(st.integers(2, 30))
    d = draw(st.integers(1, max_features))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    X = rng.normal(size=(n, d))
    defect = draw(
        st.sampled_from(["none", "constant", "duplicate", "collinear", "rows", "offset", "scale"])
    )
    dtype = np.float64
    if defect == "constant":
        X[:, draw(st.integers(0, d - 1))] = draw(st.sampled_from([0.0, 3.7, -1e8]))
    elif defect == "duplicate" and d > 1:
        X[:, -1] = X[:, 0]
    elif defect == "collinear" and d > 2:
        X[:, -1] = X[:, 0] - 2.0 * X[:, 1]
    elif defect == "rows":
        X = X[rng.integers(0, max(1, n // 4), size=n)]
    elif defect == "offset":
        dtype = draw(st.sampled_from([np.float64, np.float32]))
        X += 1e8 if dtype == np.float64 else 1e4
    elif defect == "scale":
        X *= [draw(st.sampled_from(SCALES)) for _ in range(d)]
    return X.astype(dtype), defect


@st.composite
def awkward_weights(draw, n):
    """Return sample weights for n rows: ordinary, tiny, huge, or of very different sizes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    kind = draw(st.sampled_from(["none", "ordinary", "tiny", "huge", "mixed", "one"]))
    if kind == "none":
        return None
    weight = rng.uniform(0.5, 2.0, size=n)
    if kind == "tiny":
        weight *= 1e-12
    elif kind == "huge":
        weight *= 1e12
    elif kind == "mixed":
        weight *= 10.0 ** rng.uniform(-12, 12, size=n)
    elif kind == "one":
        weight[1:] = 0.0
    return weight
