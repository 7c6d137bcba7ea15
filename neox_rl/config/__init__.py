"""NeoX YAML files and one ``metarl:`` block, read into frozen typed dataclasses."""
