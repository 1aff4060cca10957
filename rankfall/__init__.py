# SPDX-License-Identifier: Apache-2.0
"""Compact neural networks, trained end to end: low-rank tensors whose ranks the evidence chooses."""

from importlib.metadata import version as _version

from rankfall import nn as nn
from rankfall._checkpoint import load as load
from rankfall._checkpoint import save as save
from rankfall._elbo import ELBOLoss as ELBOLoss
from rankfall._elbo import kl as kl
from rankfall._evidence import RankChange as RankChange
from rankfall._evidence import select_ranks_ as select_ranks_
from rankfall._export import export as export
from rankfall._fit import fit as fit
from rankfall._formats import CP as CP
from rankfall._formats import TR as TR
from rankfall._formats import TT as TT
from rankfall._formats import TTM as TTM
from rankfall._formats import Tucker as Tucker
from rankfall._groups import parameter_groups as parameter_groups
from rankfall._posteriors import MeanField as MeanField
from rankfall._posteriors import Point as Point
from rankfall._predict import predict as predict
from rankfall._priors import HalfCauchy as HalfCauchy
from rankfall._priors import LogUniform as LogUniform
from rankfall._ranks import canonicalize_ as canonicalize_
from rankfall._ranks import grow_ranks_ as grow_ranks_
from rankfall._ranks import prune_ as prune_
from rankfall._ranks import ranks as ranks
from rankfall._selection import Evidence as Evidence
from rankfall._selection import Shrinkage as Shrinkage
from rankfall._statistics import refit_batch_norm_ as refit_batch_norm_
from rankfall._summary import summary as summary
from rankfall._tensor import LowRankTensor as LowRankTensor
from rankfall._tensorize import tensorize_ as tensorize_

__version__ = _version("rankfall")
