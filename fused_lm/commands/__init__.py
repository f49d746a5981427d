"""The programs of ``fused-lm``: each module has NAME, HELP, add_arguments(parser), run(args)."""
