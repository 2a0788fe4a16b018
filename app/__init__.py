"""The Streamlit app: views over a published release, and the notes that people write."""
