"""Jobs over millions of images, which run on Ray or in this process and can continue after a kill.

They need `pip install 'comask[jobs]'`; its packages are imported when a job is opened.
"""
