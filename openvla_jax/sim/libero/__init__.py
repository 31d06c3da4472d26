"""LIBERO: the simulator in a process of its own, its conventions, its fingerprint, and a scripted expert.

`launch`, `serving`, `simulator` and `expert` run inside the environment that `make libero-env` installs, without jax;
`conventions` and `messages` are shared; everything else runs where the policy is.
"""
