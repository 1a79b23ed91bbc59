"""
Directional statistics
======================

Test.
"""

print(1)
