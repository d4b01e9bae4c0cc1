"""Optax transformations that act on the spectrum of gradients and weights."""

from optim.adatask import ScaleByAdataskState as ScaleByAdataskState
from optim.adatask import adatask as adatask
from optim.adatask import scale_by_adatask as scale_by_adatask
from optim.labels import matrix_labels as matrix_labels
from optim.mat import MatState as MatState
from optim.mat import mat as mat
from optim.mat import mat_refresh as mat_refresh
from optim.mat import modular_rule as modular_rule
from optim.mat import random_rule as random_rule
from optim.mat import temporal_rule as temporal_rule
from optim.modular_ntk import Modules as Modules
from optim.modular_ntk import label_modules as label_modules
from optim.modular_ntk import logit_projection as logit_projection
from optim.modular_ntk import logit_sum as logit_sum
from optim.modular_ntk import modular_ntk as modular_ntk
from optim.modular_ntk import principal_eigenvalues as principal_eigenvalues
from optim.spectra import ScaleBySpectraState as ScaleBySpectraState
from optim.spectra import scale_by_spectra as scale_by_spectra
from optim.spectra import spectra as spectra
from optim.spectra import spike_rank as spike_rank
from optim.spectrum import SpectrumStats as SpectrumStats
from optim.spectrum import spectrum_stats as spectrum_stats
from optim.task_dominance import TaskDominance as TaskDominance
from optim.task_dominance import task_dominance as task_dominance
from optim.task_gradients import per_task_value_and_grad as per_task_value_and_grad
