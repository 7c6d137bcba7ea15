"""NeoX YAML files and one ``metarl:`` block, read into frozen typed dataclasses.

    files, --set -> source -> neox_compat -> leaves (types, bounds) -> load -> rules -> RunConfig
                                                                            |-> derived, placement (what follows from it)
                                                                            |-> dump (a run's config.yml), reference (configs/README.md)

Keys are declared in ``schema`` (the block) and ``neox`` (GPT-NeoX's own); everything else is made from these declarations.
"""
