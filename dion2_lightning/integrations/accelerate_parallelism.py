"""HSDP in Accelerate and the Trainer where the optimizer, not FSDP2, brings the replicas together."""

from accelerate import ParallelismConfig


class CompressedParallelismConfig(ParallelismConfig):
    """A ParallelismConfig for ``sync="compressed"``: FSDP2 shards over each replica, and does not know of the others.

    Accelerate gives FSDP2 the dimensions of its mesh that ``fsdp_dim_names`` names. Here that is ``dp_shard`` alone
    (with ``cp``, if there is one), so that FSDP2 averages gradients over a replica's ranks. The optimizer does the rest
    over ``dp_replicate``, whose ranks it finds by ``strategy=``: it has to be there, and to train all parameters.
    Data loaders, checkpoints and all else go by the whole mesh.

    Args:
        **sizes: As of ParallelismConfig, ``dp_replicate_size`` and ``dp_shard_size`` above all; each that is missing is
            what ``accelerate launch`` says, or 1.

    Example::

        accelerator = Accelerator(
            fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2),
            parallelism_config=CompressedParallelismConfig(dp_replicate_size=2, dp_shard_size=4),
        )
        optimizer = build_optimizer(model, algorithm="dion", sync="compressed", strategy=accelerator)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    """

    @property
    def fsdp_dim_names(self) -> list[str]:
        """Names of the dimensions of the mesh that FSDP2 gets."""
        return [name for name in super().fsdp_dim_names if name != "dp_replicate"]
