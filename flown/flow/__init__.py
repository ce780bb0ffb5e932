"""Flow matching: source, coupling, path, velocity, solver. t = 0 is noise, t = 1 is weights.

    x_0 ~ p_0,   dx/dt = v(x, t; c),   x_1 = the latent of a trained network

A path may lead through several marginals (`trajectory`, `metric`). Path and solver do not know each
other: they share the velocity's convention, v(x, t; c).
"""

from flown.flow.coupling import COUPLINGS, Coupling
from flown.flow.metric import LandMetric, MetricPath, energy
from flown.flow.path import PathSample, dropped, flow_matching_loss, sample_path
from flown.flow.solve import SOLVERS, Solution, integrate
from flown.flow.source import SOURCES, Checkpoint, Gaussian, KaimingNormal, KaimingUniform, Source
from flown.flow.trajectory import Path, Piecewise, Spline, knot_times
from flown.flow.velocity import UNet, VelocityConfig, guided

__all__ = [
    "COUPLINGS",
    "SOLVERS",
    "SOURCES",
    "Checkpoint",
    "Coupling",
    "Gaussian",
    "KaimingNormal",
    "KaimingUniform",
    "LandMetric",
    "MetricPath",
    "Path",
    "PathSample",
    "Piecewise",
    "Solution",
    "Source",
    "Spline",
    "UNet",
    "VelocityConfig",
    "dropped",
    "energy",
    "flow_matching_loss",
    "guided",
    "integrate",
    "knot_times",
    "sample_path",
]
