"""Array kernels: score rows against rows and reduce; solve many problems at once.

Import as `jaxling.kernels`. Needs jax, numpy and jaxtyping alone.
"""

if __name__ == "kernels":
    # Reached through a checkout's root on sys.path. The top-level name belongs to
    # Hugging Face's own package, which `transformers` probes for: hand the name over
    # where that package is installed, and stand aside where it is not.
    import importlib.machinery as _machinery
    import importlib.util as _util
    import os as _os
    import sys as _sys

    _root = _os.path.realpath(_os.path.dirname(_os.path.dirname(__file__)))
    _elsewhere = [path for path in _sys.path if _os.path.realpath(path or ".") != _root]
    _spec = _machinery.PathFinder.find_spec("kernels", _elsewhere)
    if _spec is not None and _spec.loader is not None and _spec.origin:
        _module = _util.module_from_spec(_spec)
        _sys.modules["kernels"] = _module
        _spec.loader.exec_module(_module)
    else:
        # Below every version transformers accepts; parseable, which 5.0-5.16 need.
        __version__ = "0"
else:
    from . import numerics as numerics
    from .alignment import procrustes as procrustes
    from .alignment import rcsls as rcsls
    from .alignment import rcsls_loss as rcsls_loss
    from .alignment import ridge_map as ridge_map
    from .classification import Scores as Scores
    from .classification import accuracy as accuracy
    from .classification import auc as auc
    from .classification import balanced_accuracy as balanced_accuracy
    from .classification import decision as decision
    from .classification import evaluate as evaluate
    from .classification import f1 as f1
    from .classification import predict as predict
    from .cross_entropy import CrossEntropy as CrossEntropy
    from .cross_entropy import cross_entropy as cross_entropy
    from .isomorphism import cond_hm as cond_hm
    from .isomorphism import econd_hm as econd_hm
    from .isomorphism import eigenvector_similarity as eigenvector_similarity
    from .isomorphism import h0_bottleneck as h0_bottleneck
    from .isomorphism import relational_similarity as relational_similarity
    from .isomorphism import singular_value_gap as singular_value_gap
    from .isomorphism import spanning_tree as spanning_tree
    from .isomorphism import spectrum as spectrum
    from .layer_tiles import Projection as Projection
    from .lockstep import LogisticFit as LogisticFit
    from .logistic import fit_logistic as fit_logistic
    from .neighbors import Neighbors as Neighbors
    from .neighbors import Proof as Proof
    from .neighbors import all_pairs_neighbors as all_pairs_neighbors
    from .neighbors import cross_neighbors as cross_neighbors
    from .neighbors import csls_neighbors as csls_neighbors
    from .neighbors import k_occurrence as k_occurrence
    from .neighbors import merge_neighbors as merge_neighbors
    from .neighbors import mutual_neighbors as mutual_neighbors
    from .neighbors import nearest_neighbors as nearest_neighbors
    from .problems import Problems as Problems
    from .problems import Tile as Tile
    from .problems import concatenated as concatenated
    from .problems import independent as independent
    from .problems import leave_folds_out as leave_folds_out
    from .problems import multinomial as multinomial
    from .problems import one_vs_one as one_vs_one
    from .problems import one_vs_rest as one_vs_rest
    from .problems import only_folds as only_folds
    from .problems import repeated as repeated
    from .problems import weighted as weighted
    from .projection import project_layers as project_layers
    from .reduce import Reducer as Reducer
    from .reduce import accumulate_scores as accumulate_scores
    from .reduce import finish_scores as finish_scores
    from .reduce import merge_scores as merge_scores
    from .reduce import reduce_scores as reduce_scores
    from .reducers import Largest as Largest
    from .reducers import SoftmaxMoments as SoftmaxMoments
    from .reducers import count_above as count_above
    from .reducers import group_mass as group_mass
    from .reducers import log_sum_exp as log_sum_exp
    from .reducers import maximum as maximum
    from .reducers import moments as moments
    from .ridge import RidgePath as RidgePath
    from .ridge import ridge_path as ridge_path
    from .subspaces import cka_grid as cka_grid
    from .subspaces import debiased_linear_cka as debiased_linear_cka
    from .subspaces import linear_cka as linear_cka
    from .subspaces import principal_angles as principal_angles
