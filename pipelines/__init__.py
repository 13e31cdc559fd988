"""The system on Ray: data, training, serving, captioning. Imports artemis_vlm, never the other way round."""
