# SPDX-License-Identifier: Apache-2.0
"""Ready-made training runs on real data."""
