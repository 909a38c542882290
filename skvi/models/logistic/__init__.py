r"""Bayesian logistic regression: bound, posterior of the weights, climb and predictive.

The model, for each class k against the rest (for the second of two classes only), with
:math:`t = \pm 1` and :math:`A = \mathrm{diag}(\alpha)`:

.. math::
    t_i | w, b \sim \sigma(t_i (x_i'w + b)), \quad
    w | \alpha \sim N(0, A^{-1}), \quad \alpha_g \sim \mathrm{Gam}(c_0, d_0), \quad
    b \sim N(0, \tau^2)

and the posterior :math:`q(w, b) \prod_g q(\alpha_g) \prod_i q(\omega_i)` with a Polya-Gamma
variable of each row. Its optimal :math:`q(\omega_i) = \mathrm{PG}(1, \xi_i)` turns the bound into
that of Jaakkola and Jordan (2000): Durante and Rigon (2019), arXiv:1711.06999. The log density of
row i counts :math:`s_i` times: sample weights are frequencies.

With K > 2 classes the law of a label is :math:`P(k | x) = \sigma(a_k) / \sum_j \sigma(a_j)`. The
bound is that of K independent labels, and it is one for this law as well, because

.. math:: \sigma(a_k) \prod_{j \ne k} (1 - \sigma(a_j)) \le \frac{\sigma(a_k)}{\sum_j \sigma(a_j)}:
    \qquad \prod_{j \ne k} (1 - p_j) \sum_j p_j \le \prod_{j \ne k} (1 - p_j)(1 + p_j) \le 1.

Shapes: N rows, D features, C columns of the design (the features and the intercept), M binary
models, R the rank of the rows, H the groups of features that share one weight precision.
"""
