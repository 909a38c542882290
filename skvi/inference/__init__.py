"""How to climb: drivers that know no model."""
