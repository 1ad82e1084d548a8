"""Sites and taps on any model: where tensors enter matrix products, and what is done to them there."""

from planish.network.compensated import add_compensation
from planish.network.coverage import Assignment, assign, check_covered
from planish.network.folding import fold_batchnorm, has_folded_batchnorm, unfold_batchnorm
from planish.network.hidden import put_factors, put_parts
from planish.network.ledger import Ledger, ledger
from planish.network.mlps import find_mlps, put_relu
from planish.network.norms import reestimate_batchnorm
from planish.network.query_key import reparameterize_query_key
from planish.network.residual import find_stream, rotate_stream
from planish.network.rows import divide_rows
from planish.network.sites import Product, Site, Watched, watch
from planish.network.size import weights_megabytes
from planish.network.taps import attach, detach, taps_of

__all__ = [
    "Assignment",
    "Ledger",
    "Product",
    "Site",
    "Watched",
    "add_compensation",
    "assign",
    "attach",
    "check_covered",
    "detach",
    "divide_rows",
    "find_mlps",
    "find_stream",
    "fold_batchnorm",
    "has_folded_batchnorm",
    "ledger",
    "put_factors",
    "put_parts",
    "put_relu",
    "reestimate_batchnorm",
    "reparameterize_query_key",
    "rotate_stream",
    "taps_of",
    "unfold_batchnorm",
    "watch",
    "weights_megabytes",
]
