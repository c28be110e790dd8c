"""Random bases shared by key: how an update of d weights becomes K numbers, and K numbers become an update again."""
