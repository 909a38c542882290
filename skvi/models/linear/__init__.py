r"""Bayesian linear regression: what the rows say, the climb, the predictive and the evidence.

The model, for each output, with :math:`A = \mathrm{diag}(\alpha)`:

.. math::
    y_i | w, b, \beta \sim N(x_i'w + b, \beta^{-1}), \quad
    w | \beta, \alpha \sim N(0, (\beta A)^{-1}), \quad
    \beta \sim \mathrm{Gam}(a_0, b_0), \quad \alpha_g \sim \mathrm{Gam}(c_0, d_0), \quad p(b) = 1

and the posterior :math:`q(w, b, \beta) \prod_g q(\alpha_g)`. The log density of row i counts
:math:`s_i` times: sample weights are frequencies, not precisions. Source: Drugowitsch (2013),
arXiv:1310.5438; here with several outputs and the intercept integrated out.

Shapes: N rows, D features, M outputs, R the rank of the rows, H the groups of features that share
one weight precision (1 if all do, D if every feature has its own).
"""
