"""Releases in the formats of SAEDashboard, Neuronpedia and HeadVis and as plain files, and back."""
