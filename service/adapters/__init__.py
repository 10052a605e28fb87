"""Everything that touches the world on behalf of the core, one file per vendor. The core never imports from here."""
