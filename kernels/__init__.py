"""Numerics of the studio: each operation a plain torch reference, to which faster backends may be added."""

if __name__ == "kernels":
    # With the checkout's root on sys.path this folder answers when diffusers and transformers probe for the
    # package of the same name. It must import for them and offer nothing; ours is called studio.kernels.
    def __getattr__(name: str) -> object:
        raise AttributeError(
            f"this is the folder of studio.kernels, which has no '{name}' to offer as 'kernels'"
        )
