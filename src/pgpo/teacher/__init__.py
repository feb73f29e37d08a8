"""The self-teacher: what it reads (contexts.py) and which weights it has (weights.py)."""

from .contexts import ContextTemplates, TeacherContext, build_contexts
from .weights import TEACHER_ADAPTER, Teacher

__all__ = ["TEACHER_ADAPTER", "ContextTemplates", "Teacher", "TeacherContext", "build_contexts"]
