"""Drawn footage with known truth: anime pictures with exact line art and captions, films with an edit list."""

from .film import EditList, Shot, drawings, plan_clip
from .scene import Drawing, draw
from .traits import Figure, Pose, Scene, View, caption, random_figure, random_pose, random_scene
from .video import write_clip, write_clips

__all__ = [
    "Drawing",
    "EditList",
    "Figure",
    "Pose",
    "Scene",
    "Shot",
    "View",
    "caption",
    "draw",
    "drawings",
    "plan_clip",
    "random_figure",
    "random_pose",
    "random_scene",
    "write_clip",
    "write_clips",
]
