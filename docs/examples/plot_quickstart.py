"""
Three estimators, one score
===========================

A Bayesian mixture, a variational autoencoder and a Bayesian linear model, fitted to data that
come with scikit-learn. Each is scored by its evidence lower bound: ``score(X)`` is a lower bound
on the mean of ``log p(x)``, in nats per row, with every constant, so held-out scores rank models.

Run ``make demo``; it prints one table a part and saves the pictures beside this file.
"""

import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy import stats
from sklearn.datasets import load_diabetes, load_digits, load_wine
from sklearn.decomposition import PCA, FactorAnalysis
from sklearn.linear_model import BayesianRidge, LogisticRegression
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import GridSearchCV, KFold, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skvi import BayesianLinearVI, VAETransformer, VariationalGMM

START = time.perf_counter()
HERE = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
IMAGES = HERE / "images"
IMAGES.mkdir(exist_ok=True)


def table(title: str, header: list[str], rows: list[list[object]]) -> None:
    """Print rows under a title, numbers to the right."""
    cells = [[f"{c:.3f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(len(row[j]) for row in [header, *cells]) for j in range(len(header))]
    print(f"\n{title}")
    for row in [header, ["-" * w for w in widths], *cells]:
        others = [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *others]))


# %%
# 1. How many clusters? Ask the held-out bound
# --------------------------------------------
# A grid over the truncation and the shape of the covariances, ranked by the score itself.

wine = load_wine()
pipeline = make_pipeline(StandardScaler(), VariationalGMM(random_state=0))
search = GridSearchCV(
    pipeline,
    {
        "variationalgmm__n_components": [1, 2, 3, 4, 6, 10],
        "variationalgmm__covariance_type": ["full", "tied", "diag", "spherical"],
    },
    cv=KFold(5, shuffle=True, random_state=0),
)
search.fit(wine.data)
results = search.cv_results_
shapes = np.asarray(results["param_variationalgmm__covariance_type"], dtype=str)
sizes = np.asarray(results["param_variationalgmm__n_components"], dtype=int)
scores = results["mean_test_score"]

rows = []
for i in np.argsort(-scores)[:8]:
    model = pipeline.set_params(**results["params"][i]).fit(wine.data)
    mixture = model[-1]
    rows.append(
        [
            shapes[i],
            int(sizes[i]),
            float(scores[i]),
            mixture.elbo_ / len(wine.data),
            int((mixture.weights_ > 0.01).sum()),
            float(adjusted_rand_score(wine.target, model.predict(wine.data))),
        ]
    )
table(
    f"1. Wine ({len(wine.data)} x {wine.data.shape[1]}): the best 8 of {len(scores)} by held-out "
    "ELBO (nats per row)",
    ["covariance", "K", "held-out ELBO", "elbo_ / N", "weights > 1 %", "adjusted Rand"],
    rows,
)

best = search.best_estimator_
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
for shape in ("full", "tied", "diag", "spherical"):
    chosen = shapes == shape
    left.plot(sizes[chosen], scores[chosen], "o-", label=shape)
left.set(xlabel="n_components", ylabel="held-out ELBO, nats per row", title="Model choice on wine")
left.legend()
plane = PCA(2).fit_transform(StandardScaler().fit_transform(wine.data))
labels = best.predict(wine.data)
for k, marker in zip(np.unique(wine.target), "o^s", strict=True):
    chosen = wine.target == k
    right.scatter(
        *plane[chosen].T, c=labels[chosen], marker=marker, cmap="tab10", vmin=0, vmax=9, s=30,
        label=f"cultivar {k}",
    )  # fmt: skip
right.set(xlabel="first principal axis", ylabel="second", title="Colour: component. Shape: truth")
for shape in right.legend().legend_handles:
    shape.set_array(None)  # a cultivar has a shape, and the colours of several components
    shape.set_color("grey")
figure.savefig(IMAGES / "wine.png", dpi=110)
plt.close(figure)

# %%
# 2. Codes, densities and new digits from one autoencoder
# -------------------------------------------------------
# Pixels are counts from 0 to 16. Uniform noise turns them into continuous data, so that every
# model below has a proper density and no pixel is constant.

digits = load_digits()
noise = np.random.default_rng(0).uniform(size=digits.data.shape)
X_train, X_test, y_train, y_test = train_test_split(
    digits.data + noise, digits.target, test_size=0.25, random_state=0, stratify=digits.target
)
rows = []
for n_components in (2, 4, 8, 16):
    since = time.perf_counter()
    vae = VAETransformer(n_components, random_state=0).fit(X_train)
    seconds = time.perf_counter() - since
    reader = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    reader.fit(vae.transform(X_train), y_train)
    linear = PCA(n_components).fit(X_train)
    codes = make_pipeline(linear, StandardScaler(), LogisticRegression(max_iter=1000))
    rows.append(
        [
            n_components,
            vae.score(X_test),
            float(vae.log_predictive(X_test, n_importance=200).mean()),
            float(FactorAnalysis(n_components, random_state=0).fit(X_train).score(X_test)),
            float(linear.score(X_test)),
            float(reader.score(vae.transform(X_test), y_test)),
            float(codes.fit(X_train, y_train).score(X_test, y_test)),
            round(seconds, 1),
        ]
    )
table(
    f"2. Digits ({len(X_train)} + {len(X_test)} held out, 64 pixels): nats per held-out row, and "
    "accuracy of a logistic regression on the codes",
    ["codes", "VAE ELBO", "VAE log p", "FA log p", "PPCA log p", "acc VAE", "acc PCA", "fit s"],
    rows,
)

drawn, _ = vae.sample(20, random_state=0)
again = vae.reconstruct(X_test[:10])
panels = [X_test[:10], again, drawn[:10], drawn[10:]]
figure, axes = plt.subplots(4, 10, figsize=(10, 4.4), layout="constrained")
for row, pictures in zip(axes, panels, strict=True):
    for axis, picture in zip(row, pictures, strict=True):
        axis.imshow(picture.reshape(8, 8), cmap="gray_r", vmin=0, vmax=17)
        axis.set(xticks=[], yticks=[])
for row, name in zip(axes, ["held out", "reconstructed", "drawn", "drawn"], strict=True):
    row[0].set_ylabel(name)
figure.suptitle(f"VAETransformer(n_components={vae.n_components}) on digits")
figure.savefig(IMAGES / "digits.png", dpi=110)
plt.close(figure)

# %%
# 3. How tight is the bound? Compare it with the evidence
# -------------------------------------------------------
# With a fixed weight precision the bound is the log evidence; with a shared one the evidence is
# a one-dimensional integral, so that the gap is a number one can look at.

X, y = load_diabetes(return_X_y=True)
X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.25, random_state=0)
rows = []
models = {
    "ridge": BayesianLinearVI(),
    "ard": BayesianLinearVI(prior="ard"),
    "fixed": BayesianLinearVI(prior="fixed", weight_precision=1.0),
}
for prior, linear in models.items():
    linear.fit(X_train, y_train)
    evidence = getattr(linear, "log_evidence_", None)
    rows.append(
        [
            prior,
            linear.elbo_,
            "-" if evidence is None else float(evidence),
            "-" if evidence is None else f"{max(evidence - linear.elbo_, 0.0):.2e}",
            linear.score(X_test, y_test),
            float(linear.log_predictive(X_test, y_test).mean()),
            float(linear.r2_score(X_test, y_test)),
        ]
    )
peer = BayesianRidge().fit(X_train, y_train)
mean, std = peer.predict(X_test, return_std=True)
log_density = float(stats.norm.logpdf(y_test, mean, std).mean())
rows.append(["BayesianRidge", "-", "-", "-", "-", log_density, float(peer.score(X_test, y_test))])
table(
    f"3. Diabetes ({len(X_train)} + {len(X_test)} held out, {X.shape[1]} features), nats",
    ["prior", "elbo_", "log evidence", "gap", "held-out ELBO", "held-out log p", "R2"],
    rows,
)

figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
names = load_diabetes().feature_names
for offset, (prior, linear) in zip((-0.2, 0.0, 0.2), models.items(), strict=True):
    place = np.arange(len(names)) + offset
    axis.errorbar(place, linear.coef_, 2.0 * linear.coef_std_, fmt="o", capsize=3, label=prior)
axis.axhline(0.0, color="0.6", linewidth=0.8)
axis.set_xticks(np.arange(len(names)), names)
axis.set(ylabel="coefficient, two posterior sd", title="Diabetes: three priors of the weights")
axis.legend()
figure.savefig(IMAGES / "diabetes.png", dpi=110)
plt.close(figure)

print(f"\nPictures: {IMAGES.name}/wine.png, digits.png, diabetes.png")
print(f"Total: {time.perf_counter() - START:.1f} s")
