"""Tests of what oneDNN computes in PyTorch's place."""
import pytest

from ops import onednn

needs_onednn = pytest.mark.skipif(not onednn._ONEDNN_ON_X86, reason="needs oneDNN on an x86 CPU")
